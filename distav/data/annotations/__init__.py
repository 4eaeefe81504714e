"""Tables of labels, events and teacher scores."""
