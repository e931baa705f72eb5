"""How a document becomes a sequence: a family lists spans, and everything else follows from that list."""
