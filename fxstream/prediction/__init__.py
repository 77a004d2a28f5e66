"""Prediction for many images: files of many formats into files, by any number of processes, resumable.

`predict` is the function; `job` shares images among processes, `one_image` predicts one of them; `images` and the
files of formats open what is read, `results` and they write what is computed. Libraries of formats are imported
where a file needs them. May import `tools` and below. Hands on `fxstream.predict`.
"""
