"""What an adapter is, apart from any host: its options, its factors, its folder on disk."""
