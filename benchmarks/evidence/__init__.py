"""Small models of every mixer at equal budgets on real text: what `docs/evidence.md` says, made again.

packages.py, downloads.py, archives.py, texts.py, doubles.py    the text: where it is from, and how documents come of it
gather.py                                                       the command that gathers it
studies.py, train_config.py                                     which models are compared, and their config
token_losses.py, measurement.py                                 what is measured of one model
run_model.py, run_studies.py                                    the commands that train and measure one, and all
comparison.py, tables.py, pictures.py, report.py                what follows, and the command that prints and draws it
"""
