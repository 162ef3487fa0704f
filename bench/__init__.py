"""What an artifact costs on this device, and whether that is enough to release it."""
