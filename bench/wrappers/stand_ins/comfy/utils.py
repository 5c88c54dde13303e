"""Progress bars."""


class ProgressBar:
    def __init__(self, total):
        self.total, self.current = total, 0

    def update(self, steps):
        self.current = min(self.current + steps, self.total)

    def update_absolute(self, value, total=None, preview=None):
        self.current = value
