"""The command line. Errors are a sentence, a hint and exit code 2."""
