"""`jaxgpt monitor`: a stream of texts through a classifier, with alarms by a control chart."""
