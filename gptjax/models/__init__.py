"""The model families: GPT, BERT, the Transformer and the LSTM."""
