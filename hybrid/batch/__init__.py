"""Files of requests answered unattended: lines in, lines out, and a stop at any moment loses nothing."""
