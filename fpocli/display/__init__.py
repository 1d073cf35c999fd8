"""What people look at: tables for a terminal, charts."""
