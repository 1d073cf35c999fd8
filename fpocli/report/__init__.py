"""fpo inspect and fpo saes: what is in a store, and which SAEs there are."""
