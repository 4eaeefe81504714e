"""Sources of datasets, which `distav.data.preparation.registry` lists."""
