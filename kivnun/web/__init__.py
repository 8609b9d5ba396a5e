"""The pages of the service, over its public API alone: files that the API process serves as they are.

There is no build step, no framework and no asset of another host; whatever people or models wrote is put in as text. Next:
`js/main.js`, `../service/pages.py`.
"""
