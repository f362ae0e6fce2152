"""`python -m pagestream.loadtest`, the same as `pagestream loadtest`."""

from pagestream.loadtest.cli import app

if __name__ == "__main__":
    app(prog_name="pagestream loadtest")
