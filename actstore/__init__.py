"""Every activation of a transformer over a whole corpus."""
