"""An ordinary Celery project. Nothing in this package knows Wove."""
