"""Load generation and the degradation card: sees a server as any client does, through the wire alone."""
