"""What the tests share: the resources they run on, private servers, fleets of workers."""
