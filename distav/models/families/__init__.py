"""Pretrained networks of other libraries as encoders: one module per library and modality."""
