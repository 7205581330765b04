"""Tables, charts and the page, from run folders alone; nothing here loads torch."""
