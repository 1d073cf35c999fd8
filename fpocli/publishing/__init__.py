"""fpo export: cards of models and stores, and the hub."""
