"""What a model can do, measured: skills with checkable answers, and text to predict."""
