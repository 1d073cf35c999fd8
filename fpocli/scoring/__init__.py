"""The one scoring path, and what it needs of a store: model, tokeniser and SAEs, checked."""
