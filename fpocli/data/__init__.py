"""Preference data: from files and the hub to the token ids of pairs."""
