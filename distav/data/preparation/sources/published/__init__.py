"""Sources that read the published lists of datasets as they are, with a directory of the media files."""
