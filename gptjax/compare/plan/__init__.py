"""From the question to runs: variants, matched sizes, data, budgets."""
