"""fpo compare: many runs -> the paper's tables and figures."""
