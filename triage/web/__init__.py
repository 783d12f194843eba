"""The worklist in a browser: what the radiologist keeps open all day."""
