"""A simulator of training steps on many ranks, and the measurements that it is compared with."""
