"""Pages, and the script that makes their pictures."""
