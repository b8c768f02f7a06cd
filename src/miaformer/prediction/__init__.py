"""What a model says of pictures: one, a batch, or very many.

`predictor.Predictor` runs a model on pictures, by an engine of `export.engines`; `explanation` is what each picture
was given. For very many, in reading order: `sources.find_inputs` says what pictures there are,
`classify.BatchClassifier` makes rows of a batch of them, `unfinished.UnfinishedRun` keeps rows until their file is
whole, `run.predict` joins these. The first two stand alone: a worker on another machine needs no more (`on_ray`).
"""
