"""fpo features: which features separate chosen from rejected, what they fire on, what training
did to them, and text steered by them."""
