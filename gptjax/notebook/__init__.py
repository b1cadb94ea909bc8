"""The most common notebook tasks in one call each; `gptjax` exports them."""
