"""What a frozen encoder says of volumes: features of a whole store, and probes on them."""
