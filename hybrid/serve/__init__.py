"""`kimi-local serve`: a loaded model behind the HTTP APIs that programs already speak. Knows `Kimi` and chat only."""
