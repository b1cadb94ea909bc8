"""One call each for what is done most in a notebook; `gptjax` exports them."""
