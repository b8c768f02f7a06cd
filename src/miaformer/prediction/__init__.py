"""Predictions for very many pictures: where they come from, rows about them, and runs that survive being killed.

In reading order: `sources.find_inputs` says what pictures there are, `classify.BatchClassifier` makes rows of a batch
of them, `unfinished.UnfinishedRun` keeps rows until their file is whole, `run.predict` joins these. The first two stand
alone: a worker on another machine needs no more.
"""
