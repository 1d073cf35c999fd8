"""What fpo inspect and fpo eval show in a terminal."""
