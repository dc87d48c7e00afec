"""Pretext tasks: what a backbone learns without labels."""
