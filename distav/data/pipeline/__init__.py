"""The input pipeline: sampling, reading, decoding, augmentation."""
