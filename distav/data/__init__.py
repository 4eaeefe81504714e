"""The dataset format, the input pipeline and the preparation of datasets."""
