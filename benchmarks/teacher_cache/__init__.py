"""What signals.py and its kin share: text and teacher, predictions kept once, peers' layouts, reading, growth."""
