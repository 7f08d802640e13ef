"""Queries of files."""

from __future__ import annotations

from sqlalchemy import Select

from api.errors import FileNotFound
from api.files.models import File
from api.repository import Repository


class FileRepository(Repository[File]):
    """Files of one project."""

    model = File
    missing = FileNotFound
    noun = "file"

    def visible(self) -> Select[File]:
        """All but the deleted ones."""
        return self.every().where(File.deleted_at.is_(None))

    def lock(self, file_id: str, *, shared: bool = False, param: str | None = None) -> File:
        """The row, locked until the transaction ends: no job may start to use a file while it is deleted.

        Args:
            file_id: which file.
            shared: whether others may have the same lock; for those who use the file, not those who delete it.
            param: the parameter to blame if there is none.

        Raises:
            FileNotFound: there is none in this project.
        """
        statement = self.visible().where(File.id == file_id).with_for_update(read=shared)
        file = self.session.scalar(statement)
        if file is None:
            raise FileNotFound(f"No such file: {file_id!r}.", param=param)
        return file
