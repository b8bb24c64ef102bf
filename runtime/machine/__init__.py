"""Libraries and devices that are here."""
