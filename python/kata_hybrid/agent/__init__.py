"""The client side of the guest agent's protocol."""
