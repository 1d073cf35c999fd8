"""What knows nothing of the method: messages, files, locks, signals, the hub."""
