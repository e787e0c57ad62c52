"""The only code that imports Ray: workers as actors, their backend, how Ray is started."""
