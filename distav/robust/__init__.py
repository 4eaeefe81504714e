"""What is believed about the data: which pairs correspond, which labels are right."""
