"""Other people's interfaces, one file each."""
