"""fpo train: a store -> a trained policy. The only room that imports DeepSpeed."""
