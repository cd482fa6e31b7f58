"""NPR-Engine: decodes responses that fork into parallel branches and join again."""
