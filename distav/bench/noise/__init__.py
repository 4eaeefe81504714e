"""The benchmark of learning from wrong labels and wrong pairs."""
