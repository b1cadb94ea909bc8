"""Planning the runs: variants, matched sizes, data, budgets."""
