"""What other systems tell us by HL7 v2: orders and final reports. It never sees the database."""
